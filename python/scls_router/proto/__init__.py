"""Generated protobuf and gRPC stubs of proto/scls/v1; `make proto` writes them."""
