"""One module a version. A version that was released never changes."""
