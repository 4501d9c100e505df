"""Tools of ragkit's own workshop: run the notebooks, build the documentation, take the pictures of the README."""
