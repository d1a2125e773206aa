"""Test caption files in the forms in which data sets publish them, and all real captions through
the whole data pipeline.
"""

import contextlib
import json
import subprocess
import zlib

import numpy as np
import pytest

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.image_names import ImageName
from megatron_interbert.data.packing import to_batch
from megatron_interbert.data.pretraining import PretrainingSet
from megatron_interbert.data.regions import Regions
from megatron_interbert.data.store import RegionStore
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.captions.reading import (
    Caption,
    CaptionFile,
    Complaint,
)
from megatron_interbert.preparation.building.captions.table import CaptionTable
from megatron_interbert.preparation.building.store_writer import RegionStoreWriter
from megatron_interbert.preparation.mining.search import MiningOptions, mine
from megatron_interbert.reading import read_text
from tests.shared import SHARED, needs_shared

URL = "http://x.org/a/b_c.jpg"


def write(path, content, encoding="utf-8"):
    """Write a text, the lines of JSON of a tuple of records, or anything else as JSON."""
    if isinstance(content, tuple):
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
    elif not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)

    path.write_bytes(content.encode(encoding))

    return str(path)


def read(path, kind="auto", split=""):
    """Return (captions as tuples of first name, text and language, complaints) of a file."""
    rows = list(CaptionFile(path, kind).captions(split))
    captions = [(r.names[0], r.text, r.language) for r in rows if isinstance(r, Caption)]

    return captions, [row for row in rows if isinstance(row, Complaint)]


def by_line(number, url=URL):
    return f"{number}_{zlib.crc32(url.encode())}"


COCO = {
    "images": [{"id": 42, "file_name": "000000000042.jpg"}],
    "annotations": [{"image_id": 42, "id": 7, "caption": "Two  cats. "}],
}
KARPATHY = {
    "images": [
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000000042.jpg",
            "cocoid": 42,
            "imgid": 0,
            "split": "train",
            "sentences": [{"raw": "A", "tokens": ["a"], "sentid": 3}, {"raw": "B", "sentid": 4}],
        }
    ],
    "dataset": "coco",
}
COLORS = ("red", "blue", "green")
# name: (content, (first name, caption, language) of each caption)
FILES = {
    "COCO": (COCO, [("000000000042.jpg", "Two cats.", "en")]),
    "COCO without images": ({"annotations": COCO["annotations"]}, [("42", "Two cats.", "en")]),
    "Karpathy": (KARPATHY, [("COCO_val2014_000000000042.jpg", t, "en") for t in "AB"]),
    "SBU": (
        {"image_urls": [URL], "captions": ["my cat"], "user_ids": ["x"]},
        [(by_line(0), "my cat", "en")],
    ),
    "SBU with one list more": (
        {"captions": ["a", "b"], "image_urls": [URL, URL], "ids": ["5", "6"]},
        [(by_line(0), "a", "en"), (by_line(1), "b", "en")],
    ),
    "captions by image": (
        {"0001": "one", "x.jpg": ["two", "三"]},
        [("0001", "one", "en"), ("x.jpg", "two", "en"), ("x.jpg", "三", "zh")],
    ),
    "records by image": (
        {"11": {"caption": "a dog", "width": 5}, "12": [{"caption": "a cat"}]},
        [("11", "a dog", "en"), ("12", "a cat", "en")],
    ),
    "addresses by split": (
        {"train": [{"url": URL, "caption": "a"}], "val": [{"url": URL, "caption": "b"}]},
        [(by_line(0), "a", "en"), (by_line(1), "b", "en")],
    ),
    "records by split": (
        {
            "train": [{"image": "1.jpg", "caption": "a"}],
            "val": [{"image": "2.jpg", "caption": "b"}],
        },
        [("1.jpg", "a", "en"), ("2.jpg", "b", "en")],
    ),
    "CC3M": (f"a bird\t{URL}\n" * 2, [(by_line(n), "a bird", "en") for n in range(2)]),
    "CC12M": (f"{URL}\ta bird\n" * 2, [(by_line(n), "a bird", "en") for n in range(2)]),
    "CC12M, a caption with quotes": (
        f'{URL}\t"My Little Pony" toy, 5" high\n{URL}\t"all of it"\n',
        [(by_line(0), '"My Little Pony" toy, 5" high', "en"), (by_line(1), "all of it", "en")],
    ),
    "Wukong": (f"url,caption\n{URL},一只鸟\n", [(by_line(0), "一只鸟", "zh")]),
    "table with languages": (
        "7.jpg\t一只猫\tzh\n8.jpg\tdog\ten\n",
        [("7.jpg", "一只猫", "zh"), ("8.jpg", "dog", "en")],
    ),
    "table, caption first": (
        "a red dog\t7\nthe cat\t9\n",
        [("7", "a red dog", "en"), ("9", "the cat", "en")],
    ),
    "table with a header in German": (
        "bild;beschreibung\n1.jpg;ein Hund\n2.jpg;eine Katze, schwarz\n",
        [("1.jpg", "ein Hund", "en"), ("2.jpg", "eine Katze, schwarz", "en")],
    ),
    "Flickr30k results.csv": (
        'image_name| comment_number| comment\n1000.jpg| 0| Two men, one with a "hat"\n',
        [("1000.jpg", 'Two men, one with a "hat"', "en")],
    ),
    "Flickr8k CSV": (
        'image,caption\n1_a.jpg,"a dog, brown"\n2_b.jpg,"a ""red"" cat\non two lines"\n',
        [("1_a.jpg", "a dog, brown", "en"), ("2_b.jpg", 'a "red" cat on two lines', "en")],
    ),
    "CSV with backslashes before quotes": (
        'image,caption\n1.jpg,"a \\"red\\" cat, asleep"\n2.jpg,"a dog, awake"\n',
        [("1.jpg", 'a "red" cat, asleep', "en"), ("2.jpg", "a dog, awake", "en")],
    ),
    "CSV whose commas are not quoted": (
        "image,caption\n1.jpg,a dog\n2.jpg,a cat, a mouse, and more\n3.jpg,a cow\n",
        [
            ("1.jpg", "a dog", "en"),
            ("2.jpg", "a cat, a mouse, and more", "en"),
            ("3.jpg", "a cow", "en"),
        ],
    ),
    "TSV by the rules": (
        'image\tcaption\n1.jpg\t"two\nlines, a ""tab"""\n2.jpg\tx\n3.jpg\ty\n4.jpg\tz\n',
        [
            ("1.jpg", 'two lines, a "tab"', "en"),
            *((f"{n}.jpg", text, "en") for n, text in ((2, "x"), (3, "y"), (4, "z"))),
        ],
    ),
    "Flickr30k of Hugging Face": (
        'raw,sentids,split,filename,img_id\n"[""A man."", ""One, two.""]","[0, 1]",train,1.jpg,0\n',
        [("1.jpg", "A man.", "en"), ("1.jpg", "One, two.", "en")],
    ),
    "several columns of captions": (
        "image,caption_0,caption_1\n1.jpg,a dog,one dog\n",
        [("1.jpg", "a dog", "en"), ("1.jpg", "one dog", "en")],
    ),
    "columns by language": (
        "image,caption_en,caption_zh\n1.jpg,a dog,一只狗\n",
        [("1.jpg", "a dog", "en"), ("1.jpg", "一只狗", "zh")],
    ),
    "ids that pandas has written": ("image_id,caption\n9.0,a dog\n", [("9", "a dog", "en")]),
    "Wukong's folders": (
        f"dir,url,caption\nw/1.jpg,{URL},a dog\n",
        [("w/1.jpg", "a dog", "en")],
    ),
    "ids beside addresses": (
        ({"id": 100, "url": URL, "caption": "a"}, {"id": 7, "url": URL, "caption": "b"}),
        [("100", "a", "en"), ("7", "b", "en")],
    ),
    "Flickr tokens": (
        "1000.jpg#0\tA man\n66_1a.jpg#zhc#1 一个人\n",
        [("1000.jpg", "A man", "en"), ("66_1a.jpg", "一个人", "zh")],
    ),
    "COCO-CN": (
        "COCO_val2014_000000000042#zhm#0\t两只猫\n",
        [("COCO_val2014_000000000042", "两只猫", "zh")],
    ),
    "JSON Lines of many kinds": (
        (
            {"image_id": "42", "caption": "x y", "lang": "de"},
            {"id": "9", "img_path": "1007.jpg", "sentences": ["s", "t"]},
            {"query_id": 3, "query_text": "红色连衣裙", "item_ids": [55, 66]},
            {"text_id": 4, "text": "托特包", "image_ids": [77]},
            {"product_id": 5, "query": "shoes"},
        ),
        [
            ("42", "x y", "de"),
            ("1007.jpg", "s", "en"),
            ("1007.jpg", "t", "en"),
            ("55", "红色连衣裙", "zh"),
            ("66", "红色连衣裙", "zh"),
            ("77", "托特包", "zh"),
            ("5", "shoes", "en"),
        ],
    ),
    "BLIP": (
        [{"image": "val/a.jpg", "image_id": "coco_9", "caption": ["one", "two"]}],
        [("val/a.jpg", "one", "en"), ("val/a.jpg", "two", "en")],
    ),
    "VG regions": (
        [{"id": 9, "regions": [{"image_id": 9, "region_id": 1, "phrase": "a car", "x": 1}]}],
        [("9", "a car", "en")],
    ),
    "LXMERT": (
        [{"img_id": "COCO_1", "labelf": {}, "sentf": {"mscoco": ["a"], "vg": ["b"], "gqa": ["?"]}}],
        [("COCO_1", "a", "en"), ("COCO_1", "b", "en")],
    ),
    "AI Challenger": (
        [{"url": URL, "image_id": "8f.jpg", "caption": ["一个人", "两个人"]}],
        [("8f.jpg", "一个人", "zh"), ("8f.jpg", "两个人", "zh")],
    ),
    "TextCaps": (
        {
            "dataset_type": "train",
            "data": [
                {
                    "image_id": "0054",
                    "image_path": "train/0054.jpg",
                    "caption_id": 5,
                    "caption_str": "a book",
                    "reference_strs": ["a book", "the book"],
                    "set_name": "train",
                }
            ],
        },
        [("train/0054.jpg", "a book", "en")],
    ),
    "Localized Narratives": (
        (
            {
                "dataset_id": "mscoco_val2017",
                "image_id": "137576",
                "annotator_id": 93,
                "caption": "In this image there are cows.",
                "timed_caption": [{"utterance": "In this", "start_time": 0.0}],
            },
        ),
        [("137576", "In this image there are cows.", "en")],
    ),
    "WIT": (
        "language\timage_url\tpage_title\tcaption_reference_description\tcaption_alt_text_description\n"
        f"en\t{URL}\tBirds\ta bird\t\nde\t{URL}\tVogel\t\tein Vogel\n",
        [(by_line(0), "a bird", "en"), (by_line(1), "ein Vogel", "de")],
    ),
    "KDD Cup": (
        "product_id\timage_h\timage_w\tnum_boxes\tboxes\tfeatures\tclass_labels\tquery\tquery_id\n"
        f"5\t80\t90\t1\t{'QUJD' * 20}\t{'QUJD' * 200}\tAAAA\tred shoes\t1\n",
        [("5", "red shoes", "en")],
    ),
    "shop titles": (
        [{"class_id": "7", "img_path": "Images/1/1.jpg", "title": "孕妇奶粉 800克"}],
        [("Images/1/1.jpg", "孕妇奶粉 800克", "zh")],
    ),
    "titles by item": ("item_id\ttitle\n100\t复古木质茶几\n", [("100", "复古木质茶几", "zh")]),
    "VinVL's captions": (
        '42\t[{"caption": "a cat", "id": 1}, {"caption": "two cats", "id": 2}]\n'
        '43\t[{"caption": "x y"}]\n',
        [("42", "a cat", "en"), ("42", "two cats", "en"), ("43", "x y", "en")],
    ),
    "rows in JSON": (
        [["1.jpg", "a dog"], ["2.jpg", "a cat"]],
        [("1.jpg", "a dog", "en"), ("2.jpg", "a cat", "en")],
    ),
    "records with unknown fields": (
        [{"pic": "1.jpg", "words": "a dog"}, {"pic": "2.jpg", "words": "a cat"}],
        [("1.jpg", "a dog", "en"), ("2.jpg", "a cat", "en")],
    ),
    "columns of pandas": (
        {"image": {"0": "1.jpg", "1": "2.jpg"}, "caption": {"0": "a", "1": "b"}},
        [("1.jpg", "a", "en"), ("2.jpg", "b", "en")],
    ),
    "Product1M": (
        f"62#####韩国黄金套盒精华水乳#####{URL}#####http://b/62.jpg#####黄金 面霜#;#黄金水#;#霜\n"
        f"61#####香港代购蜗牛玻尿酸#####{URL}#####http://b/61.jpg#####黄金 面霜#;#黄金水#;#霜\n",
        [("62", "韩国黄金套盒精华水乳", "zh"), ("61", "香港代购蜗牛玻尿酸", "zh")],
    ),
    "Product1M's train split": (
        f"62#####韩国黄金套盒精华水乳#####{URL}#####http://b/62.jpg\n",
        [("62", "韩国黄金套盒精华水乳", "zh")],
    ),
    "Product1M's train_id_info.json": (
        {"62": {"title": "韩国黄金套盒", "url": URL}, "61": {"title": "玻尿酸", "url": URL}},
        [("62", "韩国黄金套盒", "zh"), ("61", "玻尿酸", "zh")],
    ),
    "a dump of Hive": (
        "62\x01韩国黄金套盒, 新款\x01女装\n61\x01香港代购玻尿酸\x01女装\n",
        [("62", "韩国黄金套盒, 新款", "zh"), ("61", "香港代购玻尿酸", "zh")],
    ),
    "a table with categories that are longer": (
        "1.jpg\ta red bag\tWomen > Bags and Shoes > Bags\n"
        "2.jpg\ta blue bag\tWomen > Bags and Shoes > Bags\n"
        "3.jpg\ta green bag\tWomen > Bags and Shoes > Bags\n",
        [(f"{n}.jpg", f"a {color} bag", "en") for n, color in enumerate(COLORS, 1)],
    ),
    "Excel's note of the delimiter": (
        "sep=;\nimage;caption\n1.jpg;a dog\n",
        [("1.jpg", "a dog", "en")],
    ),
    "a header with dots and colons": (
        "image.id,caption.text:\n1,a dog\n2,a cat\n",
        [("1", "a dog", "en"), ("2", "a cat", "en")],
    ),
    "a table of generated captions": (
        f"uid,url,key,status,vlm_caption\nx,{URL},0001,ok,This image shows a dog\n",
        [("0001", "This image shows a dog", "en")],
    ),
    "Flickr8k-CN": ("1_a.jpg#zhmbosonc#0 一个人\n", [("1_a.jpg", "一个人", "zh")]),
    "Crossmodal-3600": (
        (
            {"image/key": "a", "image/locale": "fr", "fr": {"caption": ["un chat"]}, "en": {}},
            {"image/key": "b", "en": {"caption": ["a dog"]}, "zh": {"caption": ["一只狗", "狗"]}},
        ),
        [("a", "un chat", "fr"), ("b", "a dog", "en"), ("b", "一只狗", "zh"), ("b", "狗", "zh")],
    ),
    "captions by language in a record": (
        [{"image_id": "a", "caption": {"en": "a dog", "zh": "一只狗"}}],
        [("a", "a dog", "en"), ("a", "一只狗", "zh")],
    ),
    "annotations in a record": (
        [{"image": {"file_name": "1.jpg"}, "annotations": [{"caption": "a dog"}, {"id": 5}]}],
        [("1.jpg", "a dog", "en")],
    ),
    "lines with unknown fields": (
        (
            {"image": "1.jpg", "short_caption": "a dog", "long_caption": "a big dog barks"},
            {"image": "2.jpg", "short_caption": "a cat", "long_caption": "a small cat sleeps"},
        ),
        [("1.jpg", "a big dog barks", "en"), ("2.jpg", "a small cat sleeps", "en")],
    ),
    "records whose images have unknown fields": (
        [{"photo_path": "1.jpg", "caption": "a dog"}, {"photo_path": "2.jpg", "caption": "a cat"}],
        [("1.jpg", "a dog", "en"), ("2.jpg", "a cat", "en")],
    ),
    "a single record": (
        {"image/key": "a", "en": {"caption": ["a dog"]}},
        [("a", "a dog", "en")],
    ),
    "Karpathy with tokens alone": (
        {"images": [{"filename": "1.jpg", "sentences": [{"tokens": ["a", "brown", "dog"]}]}]},
        [("1.jpg", "a brown dog", "en")],
    ),
    "VL-BERT's captions in words": (
        (
            {"image": "1.jpg", "caption": ["a", "dog", "'s", "bed", "."]},
            {"image": "2.jpg", "caption": ["two", "men,", "talking"]},
        ),
        [("1.jpg", "a dog 's bed .", "en"), ("2.jpg", "two men, talking", "en")],
    ),
    "lists as Python writes them": (
        """image,captions\n1.jpg,"['a dog', 'two dogs']"\n2.jpg,"['it\\'s a cat']"\n""",
        [("1.jpg", "a dog", "en"), ("1.jpg", "two dogs", "en"), ("2.jpg", "it's a cat", "en")],
    ),
    "OFA's captions of one image": (
        "image_id\tcaption\n12\ta man rides&&two men\n",
        [("12", "a man rides", "en"), ("12", "two men", "en")],
    ),
    "ABO's listings": (
        (
            {
                "item_id": "B06",
                "item_name": [
                    {"language_tag": "en_US", "value": "a red chair"},
                    {"language_tag": "de_DE", "value": "ein Stuhl"},
                ],
                "main_image_id": "81iZ",
                "other_image_id": ["91mI", "71jw"],
            },
        ),
        [("81iZ", "a red chair", "en_US"), ("81iZ", "ein Stuhl", "de_DE")],
    ),
    "captions by language of each image": (
        {"1.jpg": {"en": "a dog", "de": "ein Hund"}, "2.jpg": {"en": ["a cat"]}},
        [("1.jpg", "a dog", "en"), ("1.jpg", "ein Hund", "de"), ("2.jpg", "a cat", "en")],
    ),
    "captions of images by split": (
        {"train": {"1.jpg": ["a dog"]}, "val": {"2.jpg": ["a cat", "two cats"]}},
        [("1.jpg", "a dog", "en"), ("2.jpg", "a cat", "en"), ("2.jpg", "two cats", "en")],
    ),
    "rows of pandas": (
        {
            "columns": ["image", "caption"],
            "index": [0, 1],
            "data": [["1.jpg", "a"], ["2.jpg", "b"]],
        },
        [("1.jpg", "a", "en"), ("2.jpg", "b", "en")],
    ),
    "records by split beside a description": (
        {
            "description": "My data",
            "version": 1,
            "train2017": [{"url": URL, "caption": "a"}, {"url": f"{URL}?2", "caption": "b"}],
            "val2017": [{"url": URL, "caption": "c"}, {"url": f"{URL}?2", "caption": "d"}],
        },
        [(by_line(n, URL + "?2" * (n % 2)), "abcd"[n], "en") for n in range(4)],
    ),
    "token files with spaces in names": (
        "1000.jpg#0\tA man\nmy photo 2.jpg#0\tA cat\n",
        [("1000.jpg", "A man", "en"), ("my photo 2.jpg", "A cat", "en")],
    ),
    "a price and an id of its own kind": (
        "asin,price,title\nB01,10,a red bag\nB02,11,a blue bag\n",
        [("B01", "a red bag", "en"), ("B02", "a blue bag", "en")],
    ),
    "Kaggle's fashion": (
        "id,gender,year,productDisplayName\n15970,Men,2011,Blue Shirt\n1163,Men,2012,A Red Shirt\n",
        [("15970", "Blue Shirt", "en"), ("1163", "A Red Shirt", "en")],
    ),
    "a title that many photos have": (
        "".join(f"{n}.jpg\tred cotton dress {n // 3} for summer\tAnn S{n}\n" for n in range(9)),
        [(f"{n}.jpg", f"red cotton dress {n // 3} for summer", "en") for n in range(9)],
    ),
    "a first row that looks like a header": (
        "door.jpg,key\nb.jpg,a red car\nc.jpg,two cats\n",
        [("door.jpg", "key", "en"), ("b.jpg", "a red car", "en"), ("c.jpg", "two cats", "en")],
    ),
    "a column that counts the rows": (
        "0\tdoor_12\ta red bag\n1\tdoor_7\ta blue bag\n",
        [("door_12", "a red bag", "en"), ("door_7", "a blue bag", "en")],
    ),
    "images that are counted": (
        "0\ta red bag\n1\ta cat\n",
        [("0", "a red bag", "en"), ("1", "a cat", "en")],
    ),
    "Excel's note, and commas": (
        "sep=;\n1.jpg;a, dog\n2.jpg;a, cat\n",
        [("1.jpg", "a, dog", "en"), ("2.jpg", "a, cat", "en")],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_the_field_are_read_as_what_they_are(tmp_path, name):
    """Check each as it is, with a byte order mark, and with the line ends of Windows."""
    content, expected = FILES[name]
    path = write(tmp_path / "captions", content)
    assert read(path) == (expected, [])
    assert f"{expected[0][1]!r}" in CaptionFile(path).describe()
    text = (tmp_path / "captions").read_text(encoding="utf-8")
    assert read(write(tmp_path / "bom", text, "utf-8-sig")) == (expected, [])
    assert read(write(tmp_path / "crlf", text.replace("\n", "\r\n"))) == (expected, [])


def test_vizwiz_leaves_out_what_its_makers_rejected(tmp_path):
    notes = [
        {"caption": "a can", "image_id": 0, "is_precanned": False, "is_rejected": False, "id": 0},
        {"caption": "spam", "image_id": 0, "is_precanned": False, "is_rejected": True, "id": 1},
        {"caption": "Quality issues", "image_id": 0, "is_precanned": True, "is_rejected": False},
    ]
    images = [{"file_name": "VizWiz_train_00000000.jpg", "id": 0}]
    captions, complaints = read(write(tmp_path / "v", {"images": images, "annotations": notes}))
    assert captions == [("VizWiz_train_00000000.jpg", "a can", "en")]
    assert [complaint.reason for complaint in complaints] == ["rejected by its data set"] * 2


CHINESE = ("一隻貓在桌上", "紅色的車")
SIMPLIFIED = ("高级感托特包斜挎", "一只狗在草地上跑步")
FRENCH = ("un café à Paris", "l'été déjà passé")
GERMAN = ("ein Mädchen läuft", "über die Straße")


@pytest.mark.parametrize(
    ("encoding", "said", "texts"),
    [
        ("gb18030", "GB18030", CHINESE),
        ("gbk", "GB18030", SIMPLIFIED),
        ("big5", "BIG5", CHINESE),
        ("latin-1", "WINDOWS-1252", FRENCH),
        ("cp1252", "WINDOWS-1252", GERMAN),
        ("latin-1", "WINDOWS-1252", ("päällä hän", "direção à direita")),
        ("euc-kr", "EUC-KR", ("빨간 그릇이 위에", "개가 달린다")),
        ("shift_jis", "SHIFT_JIS", ("赤いボウルが", "犬が走っている")),
        ("utf-16", "UTF-16", CHINESE),
        ("utf-16-le", "UTF-16LE", FRENCH),
        ("utf-16-be", "UTF-16BE", SIMPLIFIED),
    ],
)
def test_other_encodings_are_refused_with_the_command_that_converts(
    tmp_path, encoding, said, texts
):
    for name, content in (
        ("lines", f"1.jpg\t{texts[0]}\n2.jpg\t{texts[1]}\n"),
        ("json", {"1.jpg": [*texts] * 60_000}),
    ):
        path = write(tmp_path / name, content, encoding)
        with pytest.raises(UsageError, match=f"looks like {said}; convert it: iconv -f {said}"):
            CaptionFile(path)


def test_other_texts_are_refused_in_the_same_words(tmp_path):
    path = write(tmp_path / "ids.txt", "\n".join(SIMPLIFIED), "gbk")
    with pytest.raises(UsageError, match=r"--only: .*ids.txt is not UTF-8 .* iconv -f GB18030 -t"):
        read_text(path, "--only")

    folder = tmp_path / "Bob's set"
    folder.mkdir()
    path = write(folder / "ids.txt", "\n".join(SIMPLIFIED), "gbk")
    with pytest.raises(UsageError) as refused:
        read_text(path, "--only")
    command = str(refused.value).partition("convert it: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert (folder / "ids-utf8.txt").read_text(encoding="utf-8") == "\n".join(SIMPLIFIED)

    np.save(tmp_path / "numbers.npy", np.arange(1000))
    with pytest.raises(UsageError, match=r"numbers.npy is not UTF-8 text"):
        read_text(tmp_path / "numbers.npy", "--only")

    path = tmp_path / "damaged.txt"
    path.write_bytes(b"a\n\xff\nb\n")
    with pytest.raises(UsageError, match=r"damaged.txt is not UTF-8 text \(byte 2: invalid start"):
        read_text(path, "--only")


def test_values_that_stand_for_none_are_none(tmp_path):
    rows = ["1.jpg,,a dog", "\\N,,a cow", "3.jpg,,\\N", ",http://a/4.jpg,a cat", "5.jpg,,NULL"]
    content = "\n".join(["image,url,caption", *rows])
    captions, complaints = read(write(tmp_path / "c.csv", content))
    assert captions == [("1.jpg", "a dog", "en")]
    assert [complaint.reason for complaint in complaints] == [
        *("no image in the record", "no caption in the record"),
        *("no image in the record", "no caption in the record"),
    ]
    rows = "a1.jpg\ta red bag\na2.jpg\t\\N\na3.jpg\ta cat\n"
    captions, complaints = read(write(tmp_path / "c.tsv", rows))
    assert [text for _, text, _ in captions] == ["a red bag", "a cat"]
    assert [complaint.reason for complaint in complaints] == ["no caption in the record"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"captionID": "1.jpg#4", "gold_label": "contradiction", "sentence2": "no"}, "SNLI-VE"),
        ({"candidate": "B01", "target": "B02", "captions": ["is black"]}, "Fashion-IQ"),
        ({"reference": "a", "target_hard": "b", "caption": "is darker"}, "CIRR"),
        ({"img_fn": "1.jpg", "question": [], "rationale_orig": "because"}, "VCR"),
        ({"image": "1.jpg", "conversations": [{"from": "gpt", "value": "a"}]}, "LLaVA"),
    ],
)
def test_texts_that_do_not_say_what_an_image_shows_are_refused(tmp_path, record, words):
    for name, content in (("lines", (record, record)), ("array", [record])):
        with pytest.raises(UsageError, match=words):
            CaptionFile(write(tmp_path / name, content))


@pytest.mark.parametrize(
    "content",
    [
        ({"caption": "a dog", "likes": 3}, {"caption": "a cat", "likes": 7}),
        [{"caption": "a dog", "width": 640}, {"caption": "a cat", "width": 640}],
        "caption,likes\na dog,3\na cat,7\n",
        "price,title\n9,red bag\n10,blue bag\n",
        {"image": "1.jpg", "short": "dog barks", "more": "a big dog barks"},
    ],
)
def test_numbers_of_other_things_are_no_images(tmp_path, content):
    path = write(tmp_path / "c", content)
    with contextlib.suppress(UsageError):
        captions, complaints = read(path)
        assert captions == []
        assert {complaint.reason for complaint in complaints} == {"no image in the record"}


def test_a_line_that_is_not_utf_8_costs_only_itself(tmp_path):
    path = tmp_path / "c.tsv"
    path.write_bytes(b"1.jpg\ta dog\n2.jpg\tcaf\xe9 au lait\n3.jpg\ta cat\n")
    captions, complaints = read(str(path))
    assert [text for _, text, _ in captions] == ["a dog", "a cat"]
    assert [complaint.reason for complaint in complaints] == ["text is not UTF-8"]


def test_a_quote_that_is_never_closed_costs_only_its_line(tmp_path):
    rows = [f'{n}.jpg,"dog {n}, brown"' for n in range(300)]
    rows[150] = '150.jpg,"dog 150, brown'
    captions, complaints = read(write(tmp_path / "c.csv", "image,caption\n" + "\n".join(rows)))
    assert [name for name, _, _ in captions] == [f"{n}.jpg" for n in range(300) if n != 150]
    assert len(complaints) == 1
    assert "line 152" in complaints[0].where


def test_tables_that_are_no_captions_are_refused(tmp_path):
    features = "\t".join(["9", "640", "480", "2", "QUJD" * 30, "QUJD" * 300])
    for content, words in (
        (f"{features}\n{features}\n", "no column holds captions"),
        ("a red dog\ta brown cat\n", "no column names the images"),
        ("just words\n", "name it with --captions-format"),
        ({"image_urls": [URL, URL], "captions": ["a"]}, "lists of unequal length: image_urls 2"),
        (
            [{"image": "a.jpg", "conversations": [{"from": "human", "value": "What is it?"}]}],
            "JSON without captions",
        ),
        ("2,1,for image one\n1,2,for image two\n", "columns 1, 2 hold numbers"),
        ({"a": 1, "b": [2]}, "JSON without captions"),
        ([1, 2], "JSON without captions"),
        ("", "is empty"),
        ('{"a": ', "not valid JSON"),
        ('9\t[{"height": 480, "width": 640}]\n', "no column holds captions"),
    ):
        with pytest.raises(UsageError, match=words) as refusal:
            CaptionFile(write(tmp_path / "c", content))
        assert "\n" not in str(refusal.value)

    with pytest.raises(UsageError, match="not a karpathy caption file but COCO's images"):
        CaptionFile(write(tmp_path / "c.json", COCO), "karpathy")


def test_files_that_are_no_text_are_named(tmp_path):
    for start, words in (
        (b"\x1f\x8b\x08\x00", "compressed .gzip., expected text; unpack it"),
        (b"PK\x03\x04", "a spreadsheet"),
        (b"\x93NUMPY\x01", "a NumPy array"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n", "a web page"),
    ):
        (tmp_path / "c").write_bytes(start)
        with pytest.raises(UsageError, match=words):
            CaptionFile(str(tmp_path / "c"))


def test_lines_that_end_as_on_old_macs(tmp_path):
    for text in ("1.jpg\ta dog\r2.jpg\ttwo cats\r", "1.jpg#0\ta dog\r2.jpg#0\ttwo cats\r"):
        assert read(write(tmp_path / "c", text))[0] == [
            ("1.jpg", "a dog", "en"),
            ("2.jpg", "two cats", "en"),
        ]


def test_formats_may_be_named(tmp_path):
    for kind, name in (
        ("coco", "COCO"),
        ("karpathy", "Karpathy"),
        ("sbu", "SBU"),
        ("json-dict", "captions by image"),
        ("json", "BLIP"),
        ("jsonl", "JSON Lines of many kinds"),
        ("csv", "Flickr8k CSV"),
        ("tsv", "table with languages"),
        ("conceptual", "CC3M"),
        ("conceptual", "CC12M"),
        ("flickr-tokens", "Flickr tokens"),
    ):
        content, expected = FILES[name]
        assert read(write(tmp_path / "c", content), kind) == (expected, [])


def test_names_of_several_files_meet_in_the_table(tmp_path):
    """Check that numbers, file names and spellings of COCO mean one image where they can."""
    files = [
        CaptionFile(write(tmp_path / "k.json", KARPATHY)),
        CaptionFile(write(tmp_path / "zh.txt", "COCO_val2014_000000000042#zhc#0\t两只猫\n")),
    ]
    table = CaptionTable.create(tmp_path / "a.db", files, complain=pytest.fail)
    everything = [("A", "en"), ("B", "en"), ("两只猫", "zh")]
    for name in ("COCO_val2014_000000000042.jpg", "val2014/COCO_val2014_000000000042", "42", "042"):
        assert table.of_image(name) == everything
    for name in ("43", "COCO_val2014_000000000043", "a42", "nobody"):
        assert table.of_image(name) == []

    lines = ({"id": 1, "image": "7.jpg", "caption": "of 7"}, {"image": "1.jpg", "caption": "of 1"})
    table = CaptionTable.create(tmp_path / "b.db", [CaptionFile(write(tmp_path / "l", lines))])
    assert table.of_image("1") == [("of 1", "en")]
    conceptual = "zero\thttp://a/2.jpg\none\thttp://a/red_boat.jpg\ntwo\thttp://a/y.jpg\n"
    table = CaptionTable.create(tmp_path / "c.db", [CaptionFile(write(tmp_path / "c", conceptual))])
    assert table.of_image("2") == [("two", "en")]
    assert table.of_image("red_boat") == [("one", "en")]
    assert table.of_image("y") == [], "many addresses may end in y.jpg"
    files = [CaptionFile(write(tmp_path / f"{n}.tsv", f"{n} x\t{URL}\n")) for n in ("a", "b")]
    with pytest.raises(UsageError, match="build a store from each, then join the stores"):
        CaptionTable.create(tmp_path / "d.db", files)


def test_parts_of_image_names():
    for text, path, ending, number, ends in (
        ("a/b/07.JPG", "a/b/07", ".jpg", "7", ["b/07", "07"]),
        ("COCO_train2014_000000000042.npz", "COCO_train2014_000000000042", ".npz", "42", []),
        ("coco_val2014_42", "coco_val2014_42", "", "42", []),
        ("66_1a.jpg#zhc#0", "66_1a", ".jpg", "", []),
        ("https://x.org/a/b.png?size=2#top", "x.org/a/b", ".png", "", ["a/b", "b"]),
        ("https://x.org/p?id=2", "x.org/p?id=2", "", "", ["p?id=2"]),
        ("sku#12", "sku#12", "", "", []),
        ("1001\\main.jpg", "1001/main", ".jpg", "", ["main"]),
        ("./000", "000", "", "0", []),
        ("²", "²", "", "", []),
    ):
        name = ImageName(text)
        assert (name.path, name.ending, name.number, name.ends) == (path, ending, number, ends)


def test_splits_are_chosen_where_records_name_them(tmp_path):
    images = [
        {"filename": f"{i}.jpg", "split": split, "sentences": [{"raw": split}]}
        for i, split in enumerate(("train", "val", "restval"))
    ]
    path = write(tmp_path / "k.json", {"images": images})
    assert [text for _, text, _ in read(path, split="train,restval")[0]] == ["train", "restval"]
    assert len(read(path)[0]) == 3
    table = write(tmp_path / "c.csv", "image,caption,split\n1.jpg,a,train\n2.jpg,b,val\n")
    assert read(table, split="val")[0] == [("2.jpg", "b", "en")]
    files = [CaptionFile(path)]
    with pytest.raises(UsageError, match="no record is of 'valid', there are restval, train, val"):
        CaptionTable.create(tmp_path / "x.db", files, "train,valid")
    files = [CaptionFile(write(tmp_path / "plain", "1.jpg\ta dog\n"))]
    with pytest.raises(UsageError, match="hold no splits"):
        CaptionTable.create(tmp_path / "x.db", files, "train")


def test_records_of_no_use_are_complained_of_one_by_one(tmp_path):
    lines = [
        '{"image_id": 1, "caption": "good"}',
        "not json",
        '{"image_id": 2}',
        "[1]",
        '{"image_id": 3, "caption": "  "}',
        '{"image_id": 4, "caption": 5}',
        '{"caption": "of nothing"}',
        '{"image_id": "\\ud800", "caption": "x"}',
    ]
    captions, complaints = read(write(tmp_path / "x.jsonl", "\n".join(lines)))
    assert captions == [("1", "good", "en")]
    assert [
        (complaint.reason, f"line {n}" in complaint.where)
        for n, complaint in enumerate(complaints, 2)
    ] == [
        ("not a record", True),
        ("no caption in the record", True),
        ("not a record", True),
        ("empty caption", True),
        ("caption is not text", True),
        ("no image in the record", True),
        ("text is not UTF-8", True),
    ]


@needs_shared
@pytest.mark.parametrize(
    ("file", "vocabulary", "count", "images"),
    [
        ("coco_val2017.json", "bert-base-uncased", 25_014, 5_000),
        ("flickr8k_zh.txt", "bert-base-chinese", 40_455, 8_091),
    ],
)
def test_all_real_captions_are_tokenised_mined_and_packed(
    tmp_path, file, vocabulary, count, images
):
    """Check that every caption comes once, with a made-up region per image, that hard negatives are
    mined and used, and that the targets are the hidden words.
    """
    by_image = {}
    for caption in CaptionFile(str(SHARED / "data" / "captions" / file)).captions():
        by_image.setdefault(caption.names[0], []).append((caption.text, caption.language))

    assert (sum(map(len, by_image.values())), len(by_image)) == (count, images)
    words = (SHARED / "data" / "vocab" / f"{vocabulary}-vocab.txt").read_text(encoding="utf-8")
    facts = {"feature_dim": 2, "num_classes": 3, "detector": {}, "soft_labels": "dense"}

    with RegionStoreWriter(tmp_path / "store", **facts, vocabulary=words) as writer:
        for name, captions in by_image.items():
            box = np.array([[0, 0, 5, 5]], np.float32)
            one = Regions(
                name,
                (10.0, 10.0),
                np.ones((1, 2), np.float16),
                box,
                np.array([[1]]),
                np.ones((1, 1), np.float32),
            )
            writer.add(one, captions)

    store = RegionStore(str(tmp_path / "store"))
    mine(store, MiningOptions(), 2)
    tokenizer = CaptionTokenizer(str(tmp_path / "store" / "vocab.txt"))
    config = RunConfig(
        micro_batch_size=500, hard_negatives=0.5, max_tokens=128, balance_tokens=False
    )
    data = PretrainingSet(Corpus([str(tmp_path / "store")]), tokenizer, config)
    assert data.has_hard_negatives
    seen = []
    hidden = 0
    unknown = 0
    total = 0

    for start in range(0, count, 500):
        samples = np.arange(start, min(start + 500, count))
        fields = data.fields([(0, sample) for sample in samples])
        batch = to_batch(fields)
        seen += batch.sample_ids.tolist()
        ids = fields["token_ids"].copy()
        ids[fields["msm_positions"]] = fields["msm_labels"]
        pieces = np.delete(ids, np.r_[fields["text_offsets"][:-1], fields["text_offsets"][1:] - 1])
        hidden = hidden + len(batch.msm_labels)
        total = total + len(pieces)
        unknown = unknown + (pieces == tokenizer.unknown).sum()
        captions = data.draw_captions(np.zeros(len(samples), int), samples)
        expected = tokenizer.encode_batch([store.caption(int(c)) for c in captions]).ids
        np.testing.assert_array_equal(pieces, expected)

    assert seen == list(range(count))
    assert 0.14 < hidden / total < 0.20
    assert unknown / total < 0.001
    table = store.hard_negatives()
    assert (store.caption_image[table[:, 0]] != store.caption_image)[table[:, 0] >= 0].all()
    assert (table[:, 0] >= 0).mean() > 0.99
