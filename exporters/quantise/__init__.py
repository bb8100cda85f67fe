"""The frozen backbone in 8 bits: where numbers are rounded (`layout`), to which grids (`ranges`, `calibrate`), and how (`operators`)."""
