//! A page server that discards what CRIU sends to it.
//!
//! CRIU cannot dump without dumping memory, so the sender poses as the page server of the dump. The pages
//! are discarded, because the sender copies memory itself. The end of CRIU's pages marks the point at which
//! CRIU has removed its code from the target while the target is still frozen.

use super::HandoverError;
use pageferry_common::PAGE_SIZE;
use pageferry_common::criu::page_server::{Command, HeaderReader, PageLocation, Width};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

/// Size of the buffer for discarded pages, bytes.
const SCRAP_SIZE: usize = 1 << 20;

/// State of the stream of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pages {
    /// More messages may follow.
    Open,
    /// CRIU has sent all pages, and waits for the status.
    Complete,
    /// CRIU closed the socket without completing the pages.
    Closed,
}

/// The sender's end of CRIU's page-server connection.
pub(super) struct DiscardingPageServer {
    stream: UnixStream,
    headers: HeaderReader,
    state: Pages,
    opened: bool,
    discarded: u64,
    scrap: Vec<u8>,
}

impl DiscardingPageServer {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            headers: HeaderReader::default(),
            state: Pages::Open,
            opened: false,
            discarded: 0,
            scrap: vec![0; SCRAP_SIZE],
        }
    }

    /// Returns the socket to poll before [`Self::recv`]; `None` once the stream has ended.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        (self.state == Pages::Open).then(|| self.stream.as_fd())
    }

    /// Returns whether CRIU has opened an image, that is, has begun to dump a process.
    pub(super) fn has_images(&self) -> bool {
        self.opened
    }

    /// Number of pages discarded.
    pub(super) fn discarded(&self) -> u64 {
        self.discarded
    }

    /// Receives one message, discards its pages and replies to it. Returns the state after it.
    pub(super) fn recv(&mut self) -> Result<Pages, HandoverError> {
        let header = self
            .headers
            .read::<HandoverError>(&mut self.stream, Width::of_dump)?;
        let Some(header) = header else {
            self.state = Pages::Closed;
            return Ok(self.state);
        };
        match header.command {
            Command::Open { answered } => {
                self.opened = true;
                if answered {
                    self.stream.write_all(&[0])?;
                }
            }
            Command::HasParent => self.stream.write_all(&[0; 4])?,
            Command::Add(PageLocation::Present { .. }) => self.discard(header.pages)?,
            Command::Add(PageLocation::Parent | PageLocation::Elsewhere) | Command::Get => {}
            // After a dump of nothing, the rest of a wide header may remain unread.
            Command::Close => self.state = Pages::Complete,
        }
        Ok(self.state)
    }

    fn discard(&mut self, pages: u64) -> io::Result<()> {
        self.discarded += pages;
        let mut left = pages.saturating_mul(PAGE_SIZE);
        while left > 0 {
            let now = left.min(self.scrap.len() as u64) as usize;
            self.stream.read_exact(&mut self.scrap[..now])?;
            left -= now as u64;
        }
        Ok(())
    }

    /// Closes the connection: CRIU cannot block on it any more.
    pub(super) fn close(&self) {
        // It fails if CRIU has closed it.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Confirms all pages; CRIU completes the dump.
    pub(super) fn confirm(&mut self) -> io::Result<()> {
        self.stream.write_all(&0i32.to_le_bytes())
    }

    /// Rejects the pages; CRIU undoes the dump and fails.
    pub(super) fn reject(&mut self) -> io::Result<()> {
        self.stream.write_all(&(-1i32).to_le_bytes())
    }
}
