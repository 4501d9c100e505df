"""Federated tuning on Flower: several owners of data train one retriever or generator, and no row leaves its owner."""
