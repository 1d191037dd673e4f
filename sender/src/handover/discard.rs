//! A page server that throws pages away.

use super::HandoverError;
use super::dump::Next;
use pageferry_common::PAGE_SIZE;
use pageferry_common::criu::page_server::{Command, HEADER_MAX, Header, PageLocation, Width};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// Our end of CRIU's page server: it takes pages and throws them away.
pub(super) struct Endpoint {
    pub(super) stream: UnixStream,
    width: Option<Width>,
    /// Whether CRIU has come to dump any process.
    pub(super) opened: bool,
    /// Pages thrown away.
    pub(super) pages: u64,
    pub(super) ended: bool,
    scrap: Vec<u8>,
}

impl Endpoint {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            width: None,
            opened: false,
            pages: 0,
            ended: false,
            scrap: vec![0; 1 << 20],
        }
    }

    /// Takes one message.
    pub(super) fn step(&mut self) -> Result<Option<Next>, HandoverError> {
        let mut bytes = [0; HEADER_MAX];
        let (first, more) = bytes.split_at_mut(Width::Narrow.header_len());
        match self.stream.read(&mut first[..1])? {
            0 => {
                // CRIU is gone, which its other socket says too.
                self.ended = true;
                return Ok(None);
            }
            _ => self.stream.read_exact(&mut first[1..])?,
        }
        let begins = self.width.is_none();
        let narrow: &[u8; 24] = (&*first).try_into().expect("as long as a narrow header");
        let width = *self.width.get_or_insert_with(|| Width::of_dump(narrow));
        let header = match (width, Header::decode(narrow, Width::Narrow)) {
            (Width::Narrow, header) => header?,
            // A dump of nothing could be either.
            (Width::Wide, Ok(close)) if begins && close.command == Command::Close => close,
            (Width::Wide, _) => {
                self.stream.read_exact(more)?;
                Header::decode(&bytes, width)?
            }
        };
        match header.command {
            Command::Open { answered } => {
                self.opened = true;
                if answered {
                    self.stream.write_all(&[0])?;
                }
            }
            Command::HasParent => self.stream.write_all(&[0; 4])?,
            Command::Add(PageLocation::Present { .. }) => {
                self.pages += header.pages;
                let mut left = header.pages.saturating_mul(PAGE_SIZE);
                while left > 0 {
                    let now = left.min(self.scrap.len() as u64) as usize;
                    self.stream.read_exact(&mut self.scrap[..now])?;
                    left -= now as u64;
                }
            }
            Command::Add(PageLocation::Parent | PageLocation::Elsewhere) | Command::Get => {}
            Command::Close => {
                // Of a dump of nothing, the rest of a wide header may follow.
                self.ended = true;
                let at = Instant::now();
                return Ok(Some(Next::PagesEnd { at }));
            }
        }
        Ok(None)
    }

    /// Answers CRIU's end: 0 if all is safe, anything else to make it undo the dump.
    pub(super) fn status(&mut self, status: i32) -> io::Result<()> {
        self.stream.write_all(&status.to_le_bytes())
    }
}
