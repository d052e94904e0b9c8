"""Small groups of fields that optimizers, decays or the whole run share."""
