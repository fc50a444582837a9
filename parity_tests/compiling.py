"""How XLA compiles in tests: a program that runs once or twice is compiled fast, not well."""

XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
"""Without LLVM's optimiser, and by the older of XLA's generators of loops: a third of the time.

Neither is part of the mathematics. What users get, without flags, is what ``nox -s proof`` runs.
"""
