//! Waiting for descriptors of others on the tokio runtime.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use tokio::io::{
    Interest,
    unix::{AsyncFd, AsyncFdReadyGuard},
};

/// Tells when a descriptor can be read. Readiness comes in edges: after waking, read until there
/// is no more, then clear the guard.
#[derive(Debug)]
pub struct Readable(AsyncFd<OwnedFd>);

impl Readable {
    /// Watches a duplicate, so that the original may live anywhere. Must be called on a tokio
    /// runtime.
    ///
    /// # Errors
    /// When the descriptor cannot be duplicated or polled.
    pub fn new(of: &impl AsFd) -> io::Result<Self> {
        let duplicate = of.as_fd().try_clone_to_owned()?;
        // SAFETY: the AsyncFd owns the descriptor, which is therefore open and the same until the
        // AsyncFd has deregistered it.
        let fd = unsafe { AsyncFd::register_with_interest(duplicate, Interest::READABLE) };
        Ok(Self(fd.map_err(|error| error.into_parts().1)?))
    }

    /// Waits until there is something to read. Safe to drop and call again.
    ///
    /// # Errors
    /// When the runtime is going down.
    pub async fn ready(&self) -> io::Result<AsyncFdReadyGuard<'_, OwnedFd>> {
        self.0.readable().await
    }
}
