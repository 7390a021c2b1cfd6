//! What aya and the kernel answered, as [`DataplaneError`].

use aya::programs::tc;

use super::DataplaneError;

/// An error and its causes on one line, each said once.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    // The verifier's log is thousands of lines; its last ones say what it did not like.
    let lines: Vec<&str> = text.lines().collect();
    match lines.len() {
        0..=40 => text,
        n => format!("{}\n…\n{}", lines[0], lines[n - 20..].join("\n")),
    }
}

/// A program or map that the kernel refused.
pub(super) fn load_error(what: &str, error: &dyn std::error::Error) -> DataplaneError {
    DataplaneError::Load {
        message: format!("{what}: {}", chain(error)),
    }
}

/// A program or map that the object should have.
pub(super) fn missing(what: &str) -> DataplaneError {
    DataplaneError::Load {
        message: format!("{what} is not in the object"),
    }
}

/// A program that could not be attached.
pub(super) fn attach_error(
    hook: &'static str,
    target: &str,
    error: &dyn std::error::Error,
) -> DataplaneError {
    DataplaneError::Attach {
        hook,
        target: target.to_owned(),
        message: chain(error),
    }
}

/// One call that failed.
pub(super) fn syscall(call: &'static str) -> impl Fn(std::io::Error) -> DataplaneError {
    move |source| DataplaneError::Syscall {
        call: call.to_owned(),
        source,
    }
}

/// One access to a map that failed.
pub(super) fn map_error(call: &'static str) -> impl Fn(aya::maps::MapError) -> DataplaneError {
    move |error| DataplaneError::Syscall {
        call: call.to_owned(),
        source: io_error(&error),
    }
}

/// Any error as the kernel's answer.
pub(super) fn io_error(error: &dyn std::error::Error) -> std::io::Error {
    std::io::Error::other(chain(error))
}

/// Whether the kernel's answer somewhere in the chain is `errno`.
pub(super) fn has_errno(error: &(dyn std::error::Error + 'static), errno: i32) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && io.raw_os_error() == Some(errno)
        {
            return true;
        }
        next = error.source();
    }
    false
}

/// Whether what was to be made is there.
pub(super) fn is_already_there(error: &tc::TcError) -> bool {
    has_errno(error, libc::EEXIST)
}
