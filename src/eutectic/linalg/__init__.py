"""Dense linear algebra on torch, nothing else.

    polar.polar                  U Vᵀ with nuclear norm and rank, by the cheapest safe route
    leading.leading_singular     the first k singular triplets, without the others
    lowrank.LowRank              a product of thin factors; both take it without expanding it

`gram`, `qdwh`, `svd` and `lapack` lie beneath these; `select` holds exact order statistics of
streams; the solvers have modules of their own.
"""
