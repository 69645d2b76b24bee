"""Pure functions of arrays: no configuration, no state, no input or output."""
