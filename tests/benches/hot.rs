//! Micro-benchmarks of the code that every page passes through: `cargo bench -p pageferry-tests`.

use criterion::measurement::WallTime;
use criterion::{
    BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pageferry_common::digest::digest;
use pageferry_common::wire::{
    Chunk, Entry, EntryKind, FrameReader, FrameWriter, Incoming, Message, RoundKind, SharedPhase,
};
use pageferry_common::{
    CHUNK_PAGES, CHUNK_SIZE, Claim, ImageId, MigrationId, PAGE_SIZE, PageRange, ReceiverId, Token,
};
use pageferry_receiver::image::DirName;
use pageferry_receiver::image::writer::DirWriter;
use pageferry_sender::copy::source::{Access, PageSource, ProcessSource};
use pageferry_sender::sink::DEFAULT_LEVEL;
use pageferry_sender::sys::pagemap::{self, PRESENT, Query, Region, SWAPPED, WRITTEN};
use pageferry_sender::target::process::{Process, namespace_depth};
use pageferry_sender::target::sharing::Sharing;
use pageferry_tests::Victim;
use pageferry_tests::random::XorShift64;
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Returns partly random bytes, like the memory of a typical program.
fn pages() -> Vec<u8> {
    let mut random = XorShift64::new(1);
    let mut pages = vec![0; CHUNK_SIZE];
    for (index, word) in pages.chunks_exact_mut(8).enumerate() {
        let number = random.next_u64();
        let value = if index % 4 == 0 {
            number
        } else {
            number & 0xff
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    pages
}

/// Returns the entries of one chunk of data pages.
fn entries(first: u64) -> Vec<Entry> {
    let start = (1 + first) * PAGE_SIZE;
    let range = PageRange::new(start, CHUNK_PAGES as u64).expect("it is one");
    let kind = EntryKind::Data;
    vec![Entry { range, kind }]
}

/// Scans 256 MiB for populated and written pages, and reads them.
fn memory(criterion: &mut Criterion) {
    const MIB: u64 = 256;
    let mut victim = Victim::start(&format!("heap={MIB}"));
    let regions = victim.regions().into_iter();
    let region = regions.max_by_key(|it| it.length).expect("it has some");
    let whole = PageRange::new(region.start, region.length / PAGE_SIZE).expect("it is one");
    let pid = victim.pid();
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).expect("it is our child");
    let mut group = criterion.benchmark_group("memory");
    group.throughput(Throughput::Bytes(whole.bytes()));
    let query = Query {
        any: PRESENT | SWAPPED,
        report: PRESENT | SWAPPED | WRITTEN,
        ..Query::default()
    };
    let mut room = vec![Region::default(); 4096];
    if pagemap::scan(&pagemap, whole, query, &mut room, |_| {}).is_ok() {
        group.bench_function("scan", |bencher| {
            bencher.iter(|| {
                let mut found = 0;
                let each = |region: &Region| found += region.end - region.start;
                pagemap::scan(&pagemap, whole, query, &mut room, each).expect("it lives");
                black_box(found)
            });
        });
    }
    // All pages, and then every tenth.
    let all: Vec<_> = chunks_of(whole, 1).collect();
    let scattered: Vec<_> = chunks_of(whole, 10).collect();
    bench_read(&mut group, "read", pid, &all);
    // With a child, every page is shared.
    let answer = victim.ask("fork");
    assert!(answer.starts_with("ok"), "{answer}");
    bench_read(&mut group, "read shared", pid, &all);
    victim.ask("reap");
    group.throughput(Throughput::Bytes(whole.bytes() / 10));
    bench_read(&mut group, "read scattered", pid, &scattered);
    group.finish();
}

/// Lists every `step`th page of a range, a chunk at a time.
fn chunks_of(whole: PageRange, step: usize) -> impl Iterator<Item = Vec<PageRange>> {
    let mut rest = Some(whole);
    std::iter::from_fn(move || {
        let (now, later) = rest?.split_at((CHUNK_PAGES * step) as u64);
        rest = later;
        let pages = |range: PageRange| (range.start()..range.end()).step_by(step << 12);
        now.map(|range| match step {
            1 => vec![range],
            _ => pages(range)
                .filter_map(|at| PageRange::new(at, 1).ok())
                .collect(),
        })
    })
}

/// Reads chunks of the memory of a process.
fn bench_read(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    pid: i32,
    chunks: &[Vec<PageRange>],
) {
    let depth = namespace_depth(pid).expect("it lives");
    let task = Process::open(pid, pid, depth).expect("it lives");
    let mut sharing = Sharing::default();
    sharing.survey();
    let mut source = ProcessSource::new(&task, &mut sharing, Access::Running);
    let (mut buffer, mut arrived) = (vec![0; CHUNK_SIZE], Vec::new());
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            for wanted in chunks {
                arrived.clear();
                let read = source.read(wanted, &mut buffer, &mut arrived);
                read.expect("it lives");
            }
        });
    });
}

/// Computations over every chunk.
fn chunks(criterion: &mut Criterion) {
    let pages = pages();
    let mut group = criterion.benchmark_group("chunk");
    group.throughput(Throughput::Bytes(CHUNK_SIZE as u64));
    group.bench_function("checksum", |bencher| {
        bencher.iter(|| digest(black_box(&pages)));
    });
    let mut zstd = zstd::bulk::Compressor::new(DEFAULT_LEVEL).expect("there is such a level");
    let mut smaller = vec![0; CHUNK_SIZE];
    group.bench_function("compress", |bencher| {
        bencher.iter(|| zstd.compress_to_buffer(black_box(&pages), &mut smaller));
    });
    let len = zstd
        .compress_to_buffer(&pages, &mut smaller)
        .expect("it becomes smaller");
    let mut again = vec![0; CHUNK_SIZE];
    let mut unzstd = zstd::bulk::Decompressor::new().expect("there is memory");
    group.bench_function("decompress", |bencher| {
        bencher.iter(|| unzstd.decompress_to_buffer(black_box(&smaller[..len]), &mut again));
    });
    group.finish();
}

/// Sends frames through a pipe in memory.
fn frames(criterion: &mut Criterion) {
    const STALL: Duration = Duration::from_secs(60);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.expect("there can be one");
    let data = bytes::Bytes::from(pages());
    let (one, other) = tokio::io::duplex(CHUNK_SIZE + (1 << 20));
    let mut writer = FrameWriter::new(one, SharedPhase::default(), STALL);
    let mut reader = FrameReader::new(other, SharedPhase::default(), STALL);
    let claim = Claim {
        id: MigrationId([1; 16]),
        root_pid: 1,
        token: Token([2; 32]),
    };
    let (version, features) = (pageferry_common::wire::VERSION, 0);
    let page_size = PAGE_SIZE as u32;
    let hello = Message::Hello {
        version,
        page_size,
        features,
        claim,
    };
    let directory = String::new();
    let welcome = Message::Welcome {
        version,
        features,
        rounds: 0,
        receiver: ReceiverId([5; 16]),
        directory,
    };
    let (round, kind, uptime_us) = (1, RoundKind::PreDump, 1);
    let begin = Message::RoundBegin {
        round,
        kind,
        uptime_us,
    };
    runtime.block_on(async {
        for message in [
            hello,
            welcome,
            begin,
            Message::ImageOpen(ImageId::Process(1)),
        ] {
            writer.send(&message).await.expect("it is heard");
            reader.recv().await.expect("the frame was sent");
        }
    });
    let chunk = Chunk {
        entries: entries(0),
        digest: 0,
    };
    let meta = Message::Chunk(chunk).encode();
    let mut buffer = vec![0; CHUNK_SIZE];
    let mut group = criterion.benchmark_group("frame");
    group.throughput(Throughput::Bytes(CHUNK_SIZE as u64));
    group.bench_function("through memory", |bencher| {
        bencher.iter(|| {
            runtime.block_on(async {
                writer
                    .send_chunk(&meta, false, data.clone())
                    .await
                    .expect("it is heard");
                let Ok(Incoming::Chunk { data_len, .. }) = reader.recv().await else {
                    panic!("it was a chunk");
                };
                reader
                    .recv_data(&mut buffer[..data_len])
                    .await
                    .expect("the frame was sent");
            });
        });
    });
    group.finish();
}

/// Writes 64 MiB of an image, to memory if there is a tmpfs.
fn images(criterion: &mut Criterion) {
    const CHUNKS: u64 = 128;
    let pages = pages();
    let shm = std::path::Path::new("/dev/shm");
    let dir = match shm.is_dir() {
        true => tempfile::tempdir_in(shm),
        false => tempfile::tempdir(),
    };
    let dir = dir.expect("a directory can be made");
    let mut group = criterion.benchmark_group("image");
    group.throughput(Throughput::Bytes(CHUNKS * CHUNK_SIZE as u64));
    group.sample_size(20);
    group.bench_function("write", |bencher| {
        let begin = || {
            let mut writer = DirWriter::begin(dir.path(), DirName::Round(1)).expect("it is new");
            writer.open(ImageId::Process(1)).expect("it is new");
            writer
        };
        bencher.iter_batched(
            begin,
            |mut writer| {
                for chunk in 0..CHUNKS {
                    let entries = entries(chunk * CHUNK_PAGES as u64);
                    writer.put(&entries, &pages).expect("there is room");
                }
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
    // A plain file for comparison.
    let mut group = criterion.benchmark_group("file");
    group.throughput(Throughput::Bytes(CHUNKS * CHUNK_SIZE as u64));
    group.sample_size(20);
    group.bench_function("write", |bencher| {
        bencher.iter_batched(
            || File::from(memfd_create("pages", MFdFlags::empty()).expect("there is one")),
            |file| {
                for chunk in 0..CHUNKS {
                    let at = chunk * CHUNK_SIZE as u64;
                    file.write_all_at(&pages, at).expect("there is room");
                }
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

criterion_group!(hot, memory, chunks, frames, images);
criterion_main!(hot);
