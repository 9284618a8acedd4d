"""What more than one paper needs: assign formats, collect inputs, fit ranges, reconstruct, pack."""
