"""The one formula behind every decay, ``u ← u + λ(t) · m(parameter) · ψ(w)``, and each of its parts."""
