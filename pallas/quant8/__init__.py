"""Eight bits a number: block-wise codes, and optimiser steps over them."""
