"""Loss weightings: one forward and one backward of a function of the losses."""
