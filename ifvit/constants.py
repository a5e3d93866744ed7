"""The lengths on which prints, views and networks agree."""

CANVAS_PPI = 500.0  # of every print once it is decoded
RIDGE = 9.0  # px of the canvas from ridge to ridge, about 0.46 mm in an adult; windows are given in ridges
RIDGE_PERIOD = RIDGE / CANVAS_PPI  # the same in inches
MASK_CELL = 8  # px of the canvas a side that share one value of the foreground mask
STRIDE = 8  # px of the networks' window a side that make one cell
