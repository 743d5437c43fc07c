"""The proof of concept: from a folder of documents to a decision."""
