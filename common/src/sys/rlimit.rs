//! What the kernel lets one process have.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Lets this process, and those that it starts, have as many descriptors open as it may at all: each shared
/// segment takes one, each process a few, each round of a chain that is read two. The usual soft limit of 1024
/// is there for `select`, which we do not call. Best effort: with fewer, whoever needs one more says so.
pub fn raise_descriptors() {
    let _ = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_the_hard_one_then() {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, soft.min(hard - 1), hard).unwrap();
        raise_descriptors();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE), Ok((hard, hard)));
    }
}
