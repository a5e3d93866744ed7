"""The lengths on which prints, views and networks agree."""

CANVAS_PPI = 500.0  # of every print once it is decoded
RIDGE = 9.0  # px of the canvas from ridge to ridge, about 0.46 mm in an adult; windows are given in ridges
RIDGE_PERIOD = RIDGE / CANVAS_PPI  # the same in inches
MASK_CELL = 8  # px of the canvas a side that share one value of the foreground mask
MAP_STEP = 16  # px of the canvas between the points at which a map to another canvas is known
STRIDE = 8  # px of the networks' window a side that make one cell
