"""20,000 images of Fashion-MNIST (Zalando SE, MIT), in images.xz; `sparsemae.data.embedded` reads them."""
