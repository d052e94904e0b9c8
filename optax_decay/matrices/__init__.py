"""Operations on whole matrices that may be split over devices: factors, stacks, quantiles and singular values."""
