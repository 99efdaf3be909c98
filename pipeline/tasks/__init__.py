"""Tasks, one file each; importing the package registers every file in it."""
