"""How the zoo's models are trained: data, architectures, the loss, the loop and the export."""
