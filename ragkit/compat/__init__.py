"""The names, YAML files and habits of other kits, mapped onto ours."""
