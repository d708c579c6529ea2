"""`make gpu`: everything a machine with a GPU can tell about the kernels, in one command that installs nothing."""
