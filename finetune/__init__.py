"""Models made for compression: prepare, pretrain, train, merge, generate, evaluate."""
