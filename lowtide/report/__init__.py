"""Results as pictures: grids, tables and plots, drawn from numbers and images alone, without torch."""
