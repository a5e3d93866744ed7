"""Files that other software wrote: their arrays and plain values are read, and nothing in them is run."""
