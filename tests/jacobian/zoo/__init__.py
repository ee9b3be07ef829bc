"""Small decoders in plain torch, each after a pattern that people use."""

from tests.jacobian.zoo import fields as fields
from tests.jacobian.zoo import flows as flows
from tests.jacobian.zoo import images as images
from tests.jacobian.zoo import pictures as pictures
from tests.jacobian.zoo import sequences as sequences
from tests.jacobian.zoo import sets as sets
from tests.jacobian.zoo import structure as structure
from tests.jacobian.zoo import tokens as tokens
from tests.jacobian.zoo.pattern import ZOO as ZOO
