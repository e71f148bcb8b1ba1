"""The workbench: what is inside a weight file, and how to change it. One module a command; torch only for values."""
