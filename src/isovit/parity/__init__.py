"""Whether several backends compute one function: run each in a process of its own, compare all."""
