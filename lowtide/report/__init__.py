"""Results as pictures, pages and tables, drawn from numbers and images alone, without torch."""
