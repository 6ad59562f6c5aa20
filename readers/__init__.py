"""Readers of training data: token files, documents, labelled texts, images, image crops, and generated tasks."""
