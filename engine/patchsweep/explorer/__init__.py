"""Explorer: one page on this machine that sweeps two typed prompts and draws maps as they come."""
