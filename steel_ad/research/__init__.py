"""Questions about methods: sweeps, results, claims, the results page, simulations."""
