//! The processes that take part in a move, and may be killed.

use crate::daemon::kill_one;
use crate::memory;
use std::fs;

/// A process that takes part in a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Actor {
    /// `send`.
    Send,
    /// The process of `send` that stops the target during the rounds.
    Freezer,
    /// The CRIU that dumps.
    SourceCriu,
    /// `receive`.
    Receive,
    /// The CRIU that restores.
    DestinationCriu,
    /// The process that fills in the memory of a lazily restored copy.
    Filler,
}

impl Actor {
    /// Every one.
    pub const ALL: [Self; 6] = [
        Self::Send,
        Self::Freezer,
        Self::SourceCriu,
        Self::Receive,
        Self::DestinationCriu,
        Self::Filler,
    ];

    /// Returns its PID, given those of the two programs; `None` if it does not exist now.
    #[must_use]
    pub fn find(self, send: i32, receive: i32) -> Option<i32> {
        let child = |parent, is: &dyn Fn(i32) -> bool| {
            let children = memory::children(parent);
            children
                .into_iter()
                .find(|&pid| memory::lives(pid) && is(pid))
        };
        let is_criu = |pid| {
            let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
            name.starts_with(b"criu")
        };
        let has_argument = |pid, argument: &[u8]| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|&byte| byte == 0).any(|it| it == argument)
        };
        match self {
            Self::Send => Some(send).filter(|&pid| memory::lives(pid)),
            Self::Receive => Some(receive).filter(|&pid| memory::lives(pid)),
            Self::Freezer => child(send, &|pid| has_argument(pid, b"__freezer")),
            Self::SourceCriu => child(send, &is_criu),
            Self::DestinationCriu => child(receive, &is_criu),
            Self::Filler => child(receive, &|pid| has_argument(pid, b"__fill")),
        }
    }

    /// Kills it, and waits until it has exited. Returns whether it existed.
    ///
    /// # Panics
    /// If it does not exit.
    pub fn kill(self, send: i32, receive: i32) -> bool {
        let found = self.find(send, receive);
        if let Some(pid) = found {
            kill_one(pid);
            assert!(memory::await_end(&[pid]), "{self:?} does not exit");
        }
        found.is_some()
    }
}
