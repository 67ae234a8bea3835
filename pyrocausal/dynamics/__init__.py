"""Stationary and time-resolved stochastic differential equations: Lyapunov equations, stationary laws, samplers, scores."""
