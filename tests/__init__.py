"""The tests: a real server, real clients, and the policy as pure maths."""
