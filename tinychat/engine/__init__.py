"""Steps, memory and the tokens that come out of them."""
