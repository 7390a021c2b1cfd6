//! Waiting for descriptors of others on the tokio runtime.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use tokio::io::{
    Interest,
    unix::{AsyncFd, AsyncFdReadyGuard},
};

/// Registers a duplicate, so that the original may live anywhere.
fn register(of: &impl AsFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    let duplicate = of.as_fd().try_clone_to_owned()?;
    // SAFETY: the AsyncFd owns the descriptor, which is therefore open and the same until the
    // AsyncFd has deregistered it.
    let fd = unsafe { AsyncFd::register_with_interest(duplicate, interest) };
    fd.map_err(|error| error.into_parts().1)
}

/// Tells when a descriptor can be read. Readiness comes in edges: after waking, read until there
/// is no more, then clear the guard.
#[derive(Debug)]
pub struct Readable(AsyncFd<OwnedFd>);

impl Readable {
    /// Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When the descriptor cannot be duplicated or polled.
    pub fn new(of: &impl AsFd) -> io::Result<Self> {
        register(of, Interest::READABLE).map(Self)
    }

    /// Waits until there is something to read. Safe to drop and call again.
    ///
    /// # Errors
    /// When the runtime is going down.
    pub async fn ready(&self) -> io::Result<AsyncFdReadyGuard<'_, OwnedFd>> {
        self.0.readable().await
    }
}

/// Tells when nobody reads a pipe any more.
#[derive(Debug)]
pub struct Closed(Option<AsyncFd<OwnedFd>>);

impl Closed {
    /// Must be called on a tokio runtime. What cannot be polled (a regular file) never closes.
    pub fn new(of: &impl AsFd) -> Self {
        Self(register(of, Interest::ERROR).ok())
    }

    /// Waits for it. Safe to drop and call again.
    pub async fn wait(&self) {
        if let Some(fd) = &self.0
            && fd.ready(Interest::ERROR).await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }
}
