"""`torchmto bench`: step times and memory of every method against hand-written lower bounds and other libraries."""
