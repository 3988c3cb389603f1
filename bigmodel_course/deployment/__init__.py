"""Deployment: a trained model exported, run, served, and kept answering while its workers die."""
