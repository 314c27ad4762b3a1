//! How an image leaves the daemon: NBD, or a kernel block device.

pub mod device;
pub mod fdstore;
pub mod nbd;
