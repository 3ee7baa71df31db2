"""What runs where a unit runs. Standard library only, so that a worker starts in milliseconds."""
