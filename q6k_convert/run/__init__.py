"""Running a bundle's model from the command line: text, and export of a program."""
