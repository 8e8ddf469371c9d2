"""How the processes of a run reach machines. Knows the config and the run folder, never torch."""
