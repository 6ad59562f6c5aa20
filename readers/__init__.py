"""Reads what a run is trained on: token files, documents, labelled texts, images, their crops, and generated tasks."""
