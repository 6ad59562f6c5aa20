"""What goes in: token files, documents, labelled texts, images, crops of them, tasks."""
