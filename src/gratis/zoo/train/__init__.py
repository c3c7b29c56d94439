"""Training scripts of the zoo: `python -m gratis.zoo.train.NAME` trains NAME anew and says how it did."""
