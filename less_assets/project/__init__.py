"""The project file: its keys, how it is read and checked, whether the data it names is there."""
