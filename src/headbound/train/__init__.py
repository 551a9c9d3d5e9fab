"""The wind tunnel: small models trained and measured here."""
