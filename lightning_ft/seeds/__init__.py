"""Many runs of one configuration that differ in their seeds: the unpromising stopped early, the best finished."""
